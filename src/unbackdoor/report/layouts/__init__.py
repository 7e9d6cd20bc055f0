"""From the records of a run to its tables and figures, as its suite asks for."""
