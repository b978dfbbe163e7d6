/* What we take of LAPACK, through OpenBLAS. Column-major: its 'U' is our row-major lower
 * triangle. */
#ifndef TMF_AWQ_LAPACK_H
#define TMF_AWQ_LAPACK_H

void openblas_set_num_threads(int n);
void spotrf_(const char *uplo, const int *n, float *a, const int *lda, int *info);
void spotrs_(const char *uplo, const int *n, const int *nrhs, const float *a, const int *lda,
             float *b, const int *ldb, int *info);
void strtri_(const char *uplo, const char *diag, const int *n, float *a, const int *lda, int *info);

#endif
