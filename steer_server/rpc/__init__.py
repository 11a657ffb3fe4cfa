"""The wire. gRPC and protobuf are known here and nowhere else in the server."""
