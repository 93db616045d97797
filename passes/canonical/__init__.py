"""One form for what models write in many: the pass `clean` and its rules."""
