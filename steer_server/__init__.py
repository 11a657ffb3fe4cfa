"""Text generation over gRPC, steered per request by detached-Jacobian operators.

A request goes down through ``rpc`` (wire), ``compare`` or ``generate`` (an A/B, or one text), ``registry`` (which
operators) and ``engine`` (tokens); nothing imports upwards.
"""
