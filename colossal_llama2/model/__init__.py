"""Work on a LLaMA model: initialize new embedding rows, load it for training, freeze parts of it, add noise."""
