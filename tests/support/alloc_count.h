/* Counts calls of malloc and friends and of mmap by code of ours. The program links with
 * -Wl,--wrap for each of them (tests/CMakeLists.txt). */
#ifndef TMF_TESTS_ALLOC_COUNT_H
#define TMF_TESTS_ALLOC_COUNT_H

long alloc_count(void); /* calls since the program began */

#endif
