"""What artifact payloads look like: documents, tokens, reports, exchanges. The shops meet here and nowhere else."""
