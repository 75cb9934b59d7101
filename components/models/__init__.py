"""Networks: classifiers, purifiers, the defense they make together, and the folders they lie in.

How they are attacked is in `attacks`, how they are trained in `training`.
"""
