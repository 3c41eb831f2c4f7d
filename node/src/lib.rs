//! A process is assembled, observed and stopped; the millrace binary.
