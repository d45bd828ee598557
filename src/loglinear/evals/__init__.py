"""Evaluation of trained models: loss by position, and a look inside one."""
