"""The student in the formats of other libraries, each compared with the student in the library itself."""
