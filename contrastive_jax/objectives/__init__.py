"""Objectives: from embeddings to a loss. They see neither tokens nor the encoder's mesh."""
