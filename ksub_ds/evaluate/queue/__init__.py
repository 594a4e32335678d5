"""A queue of jobs in a shared folder, its workers and its status."""
