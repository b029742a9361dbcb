"""From tokens to vectors: the Transformer, its attention and dropout, and the encoder that pools token states."""
