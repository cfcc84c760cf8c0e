"""The demo that needs no download: data, tokenizer and backbones are made from handwritten digits."""
