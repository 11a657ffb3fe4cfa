"""Traces of calls for OpenTelemetry, which is imported only where they are asked for."""
