"""The vocabulary of bytes: token b is the byte b, and one more stands before a document.

It has a file of its own because what tokenises (worker processes) must not pay for importing torch.
"""

DOCUMENT_START = 256
VOCAB_SIZE = 257
