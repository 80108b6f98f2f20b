"""Reading a cache: rows of features and the images behind them."""
