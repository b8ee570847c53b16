"""kernel_check.cpp: every kernel against sums in double, as a program for sanitizers and emulators."""
