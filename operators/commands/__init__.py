"""The commands of ``steer-operators``, one module each. Heavy imports are made inside them, so that help is quick."""
