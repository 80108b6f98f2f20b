__distribution__ = "kpu"
