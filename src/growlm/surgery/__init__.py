"""Surgery on finished checkpoints and modules: conversion, usage, pruning."""
