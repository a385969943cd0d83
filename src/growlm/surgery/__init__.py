"""Surgery on finished checkpoints and modules: conversion, pruning, export."""
