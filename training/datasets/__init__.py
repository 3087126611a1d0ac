"""Where prepared data sets come from: one module for each data set's own layout."""
