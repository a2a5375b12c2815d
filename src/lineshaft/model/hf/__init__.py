"""Between our model description and Hugging Face's files. Read `config` first: its parts are in the other modules, both ways each."""
