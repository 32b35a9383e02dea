"""Training on packed documents with the Hugging Face Trainer: recipes, runs, checkpoints, progress."""
