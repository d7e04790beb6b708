"""The layouts of models on the Hugging Face hub, in and out."""
