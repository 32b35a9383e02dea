"""Training on packed documents with the Hugging Face Trainer: recipes, runs, checkpoints, progress."""

from retnet.system.extras import require

require("train", "Training", "transformers", "accelerate")
