"""A matrix that turns any word into a push: how it is taken from a model, and where it steers."""
