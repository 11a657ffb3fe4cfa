"""Text generation over gRPC, steered per request by detached-Jacobian operators.

A request goes down through ``rpc`` (wire), ``compare`` and ``generate`` (what was asked), ``registry`` (which operator)
and ``engine`` (tokens); nothing imports upwards.
"""
