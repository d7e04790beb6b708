"""GPT-2's and Llama's layout on the Hugging Face hub, in and out."""
