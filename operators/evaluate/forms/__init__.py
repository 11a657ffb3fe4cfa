"""The forms of steering that are compared: one small file each, with a tuple ``FORMS``. docs/EVAL.md says how."""
