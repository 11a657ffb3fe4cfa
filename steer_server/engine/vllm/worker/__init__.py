"""What runs inside vLLM's worker processes: pushing layer inputs, step by step, and measuring what that did."""
