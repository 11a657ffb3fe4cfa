"""What ``steer-server --check`` looks at: everything that a start needs, without serving, downloading or loading."""
