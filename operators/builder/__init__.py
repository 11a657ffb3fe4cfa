"""From a concept to a verified operator."""
