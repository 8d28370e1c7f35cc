/* What the programs beside weir have in common: the clock, and how figures are told.
 *
 * A figure is the median of rounds with its quartiles. It is printed by whoever takes it, and written as a line of JSON to the file that
 * the environment names in WEIR_FIGURES, where `make report` reads it. Rows and columns are plain words without quotes.
 */
#ifndef WEIR_FIGURES_H
#define WEIR_FIGURES_H

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static inline double now_ns(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1e9 + time.tv_nsec;
}

static inline int ascending(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;
	return (x > y) - (x < y);
}

/* The median of the samples, which it sorts and whose figure it writes. `less` is subtracted from all. */
static inline double figure(const char *table, const char *row, const char *column, const char *unit, double *samples,
			    int count, double less)
{
	qsort(samples, count, sizeof(double), ascending);
	double median = samples[count / 2] - less;
	const char *path = getenv("WEIR_FIGURES");
	FILE *file = path == NULL ? NULL : fopen(path, "a");
	if (path != NULL && file == NULL) {
		perror(path);
		exit(1);
	}
	if (file != NULL) {
		fprintf(file, "{\"table\":\"%s\",\"row\":\"%s\",\"column\":\"%s\",\"unit\":\"%s\",\"median\":%.2f,\"low\":%.2f,\"high\":%.2f}\n",
			table, row, column, unit, median, samples[(count - 1) / 4] - less, samples[(count - 1) * 3 / 4] - less);
		fclose(file);
	}
	return median;
}

#endif
