#define LINESHAFT_LANES "lanes_scalar.h"
#define LINESHAFT_TABLE kScalar
#define LINESHAFT_NAME "scalar"
#include "table.inc"
