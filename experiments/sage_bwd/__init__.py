"""Does training with an INT8 attention backward end where bfloat16 attention ends?"""
