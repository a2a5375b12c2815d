"""lineshaft: a language model from raw documents to a measured, answering service, in one package."""
