"""What answers on the server's ports while its engine loads: a process of its own, which ends when they are needed.

Of its own, because the loading thread holds Python for seconds at a time, and because vLLM forks: gRPC does not stand
that, and a forked process would keep the ports.
"""
