"""Token ids from text: XLM-R's SentencePiece layout, and any tokenizer of HuggingFace."""
