"""Files of many concepts, and the builds that they ask for."""
