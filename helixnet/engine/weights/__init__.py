"""Where weights come from: prepared model folders in the cache, fed by GGUF files, safetensors and the hub."""
