"""Training: a base from scratch, and modules beside a frozen base. Never serves a request."""
