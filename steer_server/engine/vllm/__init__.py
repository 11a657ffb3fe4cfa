"""The serving engine: vLLM with a worker of ours. Importable only where vLLM is installed, but for its options."""
