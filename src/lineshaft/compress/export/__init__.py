"""A checkpoint for other engines: GGUF (llama.cpp) and ONNX. Read `exporting` first; `gguf` and `onnx` write one format each."""
