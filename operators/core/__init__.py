"""What an operator is and does: its file, the steering equation, the store. All that a server needs."""
