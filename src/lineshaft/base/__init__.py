"""The ground floor: errors, configuration, the artifact store, progress on the terminal, the metric catalogue.

Knows nothing of models or data. Read `errors` first, then `config`, then `store`.
"""
