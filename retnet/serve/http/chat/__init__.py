"""Chats: conversations as tokens by the model's template, answers, and calls of tools."""
