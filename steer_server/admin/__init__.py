"""What changes the store while the server runs: files that are uploaded, operators that come and go."""
