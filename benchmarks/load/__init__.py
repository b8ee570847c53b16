"""The load test: two servers, one of them under load at a time, the same requests for both."""
