"""Evaluation: fine-tuning and scoring on XNLI and GLUE, by any number of workers on a shared folder."""
