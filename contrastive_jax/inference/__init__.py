"""A trained model as a function of text: loading, batching, exact search, caches, files of vectors, export."""
