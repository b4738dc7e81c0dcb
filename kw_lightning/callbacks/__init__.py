"""What goes into a Trainer: conversion, temperature, attention statistics, exact resume, sharding."""
