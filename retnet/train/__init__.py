"""Training on packed documents, on the Hugging Face Trainer: recipe, run, progress, loss curve."""
